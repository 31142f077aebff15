"""The object tree: secrets, throttle groups, I/O threads, and the devices that disks are plugged into."""
