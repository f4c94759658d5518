"""The exchange of a model's gradients: from what backward leaves to averages that are ready to step.

Hooks catch gradients, an averager averages them on a communication thread, and the exchange tells the training loop
when, and whether, the averages can be applied.
"""
