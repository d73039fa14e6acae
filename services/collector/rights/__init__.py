"""What people may ask of their data: to be forgotten, to be learnt from or not, and not to be kept for ever."""
