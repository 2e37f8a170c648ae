"""One module per origin of episodes; each yields `Episode` objects and imports its special dependencies where used."""
