"""Which image, when: splits, order, plans."""
