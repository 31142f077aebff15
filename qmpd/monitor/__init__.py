"""QMP, from the byte stream to the call of a handler and back; it knows nothing of disks."""
