"""`python tests/keeping.py CONFIG.json`: hloss.training, but the last checkpoint stays, for who wants its weights."""

from hloss import training

if __name__ == "__main__":
    training.remove_checkpoints = lambda folder: None
    training.main()
