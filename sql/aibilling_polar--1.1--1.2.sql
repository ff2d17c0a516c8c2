\echo Use "ALTER EXTENSION aibilling_polar UPDATE TO '1.2'" to load this file. \quit

-- Part 1: what a row is, what Polar may have, and who may stop whom.

-- Part 2: prices and what replies cost.
