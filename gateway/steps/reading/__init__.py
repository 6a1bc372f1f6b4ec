"""steps (pure): reading: the steps between a page, the models that find and read its lines, and its text."""
