"""The network: verbs by which ranks exchange bytes, and how a process joins the others, whatever launched it.

Nothing here knows what the bytes mean.
"""
