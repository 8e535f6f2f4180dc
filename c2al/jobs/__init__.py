"""One file a job; each is a subcommand of `c2al`."""
