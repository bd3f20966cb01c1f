"""An encoded image: is it one, how large, how turned."""
