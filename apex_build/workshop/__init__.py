"""The patch workshop: show the state of a series on a pin, change it, port it to another pin, test and export it."""
