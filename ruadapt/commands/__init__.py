"""What the command line does, a module for each family of commands."""
