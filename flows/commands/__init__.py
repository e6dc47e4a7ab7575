"""The commands of the command line, by what they work on. Heavy libraries are imported inside handlers."""
