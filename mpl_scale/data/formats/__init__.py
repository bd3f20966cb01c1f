"""Where the encoded images of a data set are: one file per format."""
