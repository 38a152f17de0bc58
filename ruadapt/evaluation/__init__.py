"""Is the adapted model still as good, and is it faster: tasks, bits per byte, speed, and how sure we are."""
