"""The patch workshop: the state of a series on a pin, changing it, porting it to another, testing and exporting it."""
