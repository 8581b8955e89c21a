"""What merging costs: streams beside merges and exports, and the speed of an adapter that is served merged."""
