// What JDBC does to a usage table, in its own words:  java -cp DRIVER Jdbc.java jdbc STEP
// Steps and result as in clients.py.  JDBC has no Unix sockets: the server listens on 127.0.0.1.

import java.math.BigDecimal;
import java.sql.*;
import java.time.OffsetDateTime;
import java.util.*;

public class Jdbc {
	static final String COLUMNS = "external_id, service_tier, tags, input_tokens, cost_nanos, cost_cents, cost_status";
	static final long BIG = (1L << 53) + 1;
	static Connection db;

	static Map<String, Object> row(Object... pairs) {
		Map<String, Object> row = new LinkedHashMap<>();
		for (int i = 0; i < pairs.length; i += 2)
			row.put((String) pairs[i], pairs[i + 1]);
		return row;
	}

	static final Map<String, Object> call = row("external_id", "jdbc_1", "occurred_at",
			OffsetDateTime.parse("2026-01-02T03:04:05.678Z"), "provider", "openai", "model", "gpt-5", "external_customer_id",
			"customer", "input_tokens", 1200L, "output_tokens", 350L, "provider_cost", null, "tags", "{\"team\": \"a\", \"n\": 1.5}");
	static final Map<String, Object> bare = row("external_id", null, "occurred_at", null, "service_tier", null, "tags", null,
			"request_count", null, "event_name", "", "provider", "openai", "model", "gpt-5", "external_customer_id", "jdbc_nulls",
			"input_tokens", 1000L);
	static final Map<String, Object> large = row("external_id", "jdbc_big", "provider", "tiny", "model", "tiny",
			"external_customer_id", "customer", "input_tokens", BIG);

	static int type(String column) {
		switch (column) {
			case "occurred_at": return Types.TIMESTAMP_WITH_TIMEZONE;
			case "input_tokens": case "output_tokens": case "request_count": return Types.BIGINT;
			case "provider_cost": return Types.NUMERIC;
			case "tags": return Types.OTHER;
			default: return Types.VARCHAR;
		}
	}

	static String quote(String text) {
		return text == null ? "null" : "\"" + text.replace("\\", "\\\\").replace("\"", "\\\"") + "\"";
	}

	static String show(ResultSet result) throws SQLException {
		result.next();
		long tokens = result.getLong("input_tokens"), nanos = result.getLong("cost_nanos");
		BigDecimal cents = result.getBigDecimal("cost_cents");
		return String.format("{\"external_id\": %s, \"tier\": %s, \"tags\": %s, \"input\": \"%d\", \"nanos\": \"%d\", \"cents\": \"%s\", \"status\": %s}",
				quote(result.getString("external_id")), quote(result.getString("service_tier")), result.getString("tags"), tokens, nanos,
				cents.toPlainString(), quote(result.getString("cost_status")));
	}

	static PreparedStatement insert(Map<String, Object> row, String more) throws SQLException {
		String sql = "INSERT INTO by_jdbc (" + String.join(", ", row.keySet()) + ") VALUES ("
				+ String.join(", ", Collections.nCopies(row.size(), "?")) + ") " + more + " RETURNING " + COLUMNS;
		PreparedStatement statement = db.prepareStatement(sql);
		int i = 0;
		for (Map.Entry<String, Object> column : row.entrySet()) {
			if (column.getValue() == null)
				statement.setNull(++i, type(column.getKey()));
			else
				statement.setObject(++i, column.getValue(), type(column.getKey()));
		}
		return statement;
	}

	static String conflict(Map<String, Object> row) {
		List<String> sets = new ArrayList<>();
		for (String column : row.keySet())
			sets.add(column + " = excluded." + column);
		return "ON CONFLICT (external_id) DO UPDATE SET " + String.join(", ", sets);
	}

	public static void main(String[] args) throws Exception {
		db = DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE"),
				System.getenv("PGUSER"), "");
		List<String> parts = new ArrayList<>();
		String warnings = "";
		if (args[1].equals("write")) {
			parts.add("\"insert\": " + show(insert(call, "").executeQuery()));
			parts.add("\"nulls\": " + show(insert(bare, "").executeQuery()));
			Map<String, Object> nobody = new LinkedHashMap<>(bare);
			nobody.put("external_customer_id", null);
			PreparedStatement statement = insert(nobody, "");
			statement.executeQuery();
			for (SQLWarning w = statement.getWarnings(); w != null; w = w.getNextWarning())
				warnings += w.getMessage();
			insert(large, "").executeQuery();
		}
		parts.add("\"upsert\": " + show(insert(call, conflict(call)).executeQuery()));
		// a few times, after which the driver takes a prepared statement and binary values
		PreparedStatement read = db.prepareStatement("SELECT " + COLUMNS + " FROM by_jdbc WHERE external_id = ?");
		String shown = "";
		for (int i = 0; i < 7; i++) {
			read.setString(1, "jdbc_big");
			shown = show(read.executeQuery());
		}
		parts.add("\"read\": " + shown);
		parts.add("\"warnings\": [" + quote(warnings) + "]");
		System.out.println("{" + String.join(", ", parts) + "}");
		db.close();
	}
}
