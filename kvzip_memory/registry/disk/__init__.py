"""The disk tier: contexts in a folder that any number of processes share."""
