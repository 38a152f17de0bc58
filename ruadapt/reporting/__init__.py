"""Tables for readers, and what results were made with."""
