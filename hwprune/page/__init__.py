"""The page a person reads of a pruned folder: report.html, one file, made from report.json."""
