\echo Use "ALTER EXTENSION aibilling_polar UPDATE TO '1.1'" to load this file. \quit

-- A role's own token is its own: what a server says to it is kept apart.

ALTER TABLE aibilling.server_state
	ADD COLUMN role oid NOT NULL DEFAULT 0;
COMMENT ON COLUMN aibilling.server_state.role IS
'0: the state holds for all usage tables of the server; a role: for its usage tables, because it has a user mapping, or a pause, of its own';
