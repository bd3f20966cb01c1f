"""The loop: phases in order, evaluation, checkpoints, and what is written on the way."""
