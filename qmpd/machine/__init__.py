"""The machine that an emulator shows to its clients: a table of answers and a run state, no processor."""
