from bench.small import small as small
