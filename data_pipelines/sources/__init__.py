"""Where pairs come from: one file per storage format, each a `records.Source`."""
