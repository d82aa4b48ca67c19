"""Many requests answered at once for evaluation: what they share is read once (`reader`)."""
