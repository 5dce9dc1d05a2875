"""What every room uses: flags, files, tables, statistics, the Hub."""
