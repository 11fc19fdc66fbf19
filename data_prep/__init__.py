"""Prepare datasets: from an original archive or your own images to the files that training reads."""
