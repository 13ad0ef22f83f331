"""The front of a search within a budget of accuracy: its metric against bytes and milliseconds, as a picture and a page."""
