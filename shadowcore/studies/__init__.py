"""One workload under several designs; what a study can be set to; figures that were published, predicted."""
