"""The `ivideogpt data` commands, one file each: `add(commands)` adds its parser, whose `func(args)` runs it."""
