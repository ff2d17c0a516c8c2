#include "postgres.h"

#include "server.h"
