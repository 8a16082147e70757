"""The commands of `megatrain`: arguments and output."""
