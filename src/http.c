#include "postgres.h"

#include "http.h"
