"""One run: train, choose the iteration on validation classes, evaluate on the test set once, write the run folder."""
