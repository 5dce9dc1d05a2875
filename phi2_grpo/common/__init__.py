"""What all of the scripts use: flags, files, tables, statistics, the Hub."""
