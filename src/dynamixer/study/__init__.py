"""The study of docs/evidence.md: its rows, the queue that trains them, and the page that is made from the results."""
