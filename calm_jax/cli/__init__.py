"""The commands: `main` of each parses what follows its name, and calls the library."""
