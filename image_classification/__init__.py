"""Images and models: the networks, the data that feeds them, and the loop that trains them.

It knows nothing of compression, of the network between ranks, or of the command line.
"""
