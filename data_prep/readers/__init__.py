"""Files of rows and tables of every format: one reader each."""
