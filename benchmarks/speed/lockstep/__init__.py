"""Programs that train in turns, an iteration each, so that a busy machine slows all of them alike."""
