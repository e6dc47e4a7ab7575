"""What trains and what is frozen, the loop around it, and how the result is written."""
