"""How an image is seen: views, DALI, resizing, and what takes the place of bad images."""
