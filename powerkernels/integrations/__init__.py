"""One module per neighbour; each is imported only by whoever asks for it."""
