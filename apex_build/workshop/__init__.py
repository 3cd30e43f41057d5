"""The patch workshop: how a series stands on a pin, changing it, porting it to another, testing and exporting it."""
