"""The commands of `ivideogpt`, one file each: `add_parser(subparsers)` and the function that it runs."""
