"""The commands about reward models: `thumbwheel reward init` and `thumbwheel reward report`."""
