"""What merging costs: time and memory of merges and exports, streams beside them, and the speed of an adapter that is
served merged."""
