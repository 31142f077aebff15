"""The QMP commands, one module for each schema file.

A module offers `HANDLERS`, a table from command names to functions.  A
handler turns a command's arguments into one call below, and the result back
into QAPI's names.  `human` has the text monitor's commands, which call the same handlers.
"""
