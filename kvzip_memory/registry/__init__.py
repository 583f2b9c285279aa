"""Where contexts are kept and by what they are found."""
