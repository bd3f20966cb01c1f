"""A trained network at work: its scores of any images, predictions for new ones, an evaluation on labelled ones."""
