"""The index of a data set: format, reader, writer, building, subsets."""
