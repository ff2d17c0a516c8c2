
=pod

=head1 NAME

PolarServer - start and drive the stand-in of Polar and Narev

=head1 SYNOPSIS

  use PolarServer;

  my $polar = PolarServer->new(state => "$tempdir/polar.state");

  $polar->fault(kind => '429', retry_after => 2, times => 3);
  ... CREATE SERVER ... OPTIONS (url '$url') with $polar->url ...
  $polar->wait(events => 500);
  is($polar->summary->{cost_amount}, '12.5', 'every cent has arrived');
  $polar->stop;

=head1 DESCRIPTION

Runs polar_server.py, which lies beside this file and describes the faults and
the control API. Only Perl's core modules are needed. The stand-in ends with
the object, or with the process that made it, however that ends.

=cut

package PolarServer;

use strict;
use warnings;

use Carp;
use File::Basename;
use File::Spec;
use HTTP::Tiny;
use IPC::Open2;
use JSON::PP;
use Time::HiRes;

our $TOKEN = 'polar_oat_test';
our $NAREV_TOKEN = 'narev_test';

my $program = File::Spec->catfile(dirname(File::Spec->rel2abs(__FILE__)),
	'polar_server.py');
my $json = JSON::PP->new->utf8->canonical->allow_nonref;

# Options of the program that take a value, and those that do not.
my @valued = qw(port state token narev_token organization prices tls_cert
  tls_key);
my @flags = qw(sink sandbox);

=pod

=head1 METHODS

=over

=item PolarServer->python

The path of a Python that can run the stand-in, or undef: skip the test then.

=cut

sub python
{
	foreach my $dir (File::Spec->path)
	{
		my $path = File::Spec->catfile($dir, 'python3');
		return $path if -x $path && !-d _;
	}
	return undef;
}

=pod

=item PolarServer->new(%options)

Start a stand-in. Options are those of the program: port, state, token,
narev_token, organization, prices, tls_cert, tls_key, sink, sandbox.

=cut

sub new
{
	my ($class, %options) = @_;
	my $self = bless { options => {} }, $class;

	foreach my $name (@valued, @flags)
	{
		$self->{options}{$name} = delete $options{$name}
		  if exists $options{$name};
	}
	croak 'unknown option: ' . join(', ', sort keys %options) if %options;
	$self->start;
	return $self;
}

=pod

=item $polar->start

Start it again after stop or kill, on the same port.

=cut

sub start
{
	my ($self) = @_;
	my $options = $self->{options};
	my $python = $self->python or croak 'python3 is not on PATH';
	my @command = ($python, $program);

	croak 'the stand-in runs already' if $self->{pid};
	foreach my $name (@valued, @flags)
	{
		next unless defined $options->{$name};
		push @command, '--' . ($name =~ tr/_/-/r);
		push @command, $options->{$name} if grep { $_ eq $name } @valued;
	}

	my ($out, $in);
	$self->{owner} = $$;
	$self->{pid} = open2($out, $in, @command);
	$self->{in} = $in;

	# The program closes its output when it is ready.
	my @ports = <$out>;
	close $out;
	chomp @ports;
	if (!@ports)
	{
		$self->stop;
		croak 'the stand-in of Polar did not start';
	}
	$self->{port} = $options->{port} = $ports[0];
	$self->{control_port} = $ports[-1];
	return;
}

=pod

=item $polar->stop, $polar->kill, $polar->restart

stop lets it end, kill ends it as a crash would; both wait for the end. restart
is kill and start: without a state file, all is forgotten.

=cut

sub stop
{
	my ($self) = @_;
	my $pid = delete $self->{pid} or return;
	local $?;

	close delete $self->{in};
	waitpid($pid, 0);
	return;
}

sub kill
{
	my ($self) = @_;

	CORE::kill('KILL', $self->{pid}) if $self->{pid};
	$self->stop;
	return;
}

sub restart
{
	my ($self) = @_;

	$self->kill;
	$self->start;
	return;
}

sub DESTROY
{
	my ($self) = @_;
	local ($@, $!, $?);

	# A forked child must not wait for its parent's stand-in.
	$self->stop if ($self->{owner} // 0) == $$;
	return;
}

=pod

=item $polar->port, $polar->url, $polar->token, $polar->narev_token

=cut

sub port
{
	return $_[0]->{port};
}

sub url
{
	my ($self) = @_;
	my $scheme = $self->{options}{tls_cert} ? 'https' : 'http';

	return "$scheme://127.0.0.1:$self->{port}";
}

sub token
{
	return $_[0]->{options}{token} // $TOKEN;
}

sub narev_token
{
	return $_[0]->{options}{narev_token} // $NAREV_TOKEN;
}

=pod

=item $polar->request($method, $path, $body, \%headers)

Send a request as a client would, on a connection of its own. $body is text or
bytes as they are to be sent. Returns HTTP::Tiny's answer, with the decoded
body as "json" if it is JSON; a status of 599 means that there was no answer.

=cut

sub request
{
	my ($self, $method, $path, $body, $headers) = @_;
	my $port =
	  $path =~ m{^/_test/} ? $self->{control_port} : $self->{port};
	my $answer = $self->_http->request(
		$method,
		"http://127.0.0.1:$port$path",
		{
			headers => $headers // {},
			defined $body ? (content => $body) : ()
		});

	$answer->{json} = eval { $json->decode($answer->{content}) };
	return $answer;
}

# The environment's proxies have no business on the loopback.
sub _http
{
	return HTTP::Tiny->new(
		keep_alive => 0,
		max_redirect => 0,
		timeout => _timeout() + 10,
		proxy => undef,
		http_proxy => undef,
		https_proxy => undef);
}

sub _timeout
{
	no warnings 'once';
	return $PostgreSQL::Test::Utils::timeout_default
	  || $ENV{PG_TEST_TIMEOUT_DEFAULT}
	  || 180;
}

=pod

=item $polar->ingest(\@events, %headers)

Send events with the right token. Headers given replace or, if undef, remove
those that a good request has.

=cut

sub ingest
{
	my ($self, $events, %given) = @_;
	my %headers = (
		'Authorization' => 'Bearer ' . $self->token,
		'Content-Type' => 'application/json',
		%given);

	delete @headers{ grep { !defined $headers{$_} } keys %headers };
	return $self->request('POST', '/v1/events/ingest',
		ref $events ? $json->encode({ events => $events }) : $events,
		\%headers);
}

# Call the control API; returns the decoded answer, and its status in a list.
sub _control
{
	my ($self, $method, $name, $body) = @_;
	my $answer = $self->request($method, "/_test/$name",
		defined $body ? $json->encode($body) : undef);

	croak "$method $name: $answer->{status} $answer->{content}"
	  if $answer->{status} != 200 && $answer->{status} != 408;
	return wantarray ? ($answer->{json}, $answer->{status}) : $answer->{json};
}

sub _query
{
	my ($name, %query) = @_;

	return $name unless %query;
	return $name . '?' . join('&', map { "$_=$query{$_}" } sort keys %query);
}

=pod

=item $polar->events(%query), $polar->requests(%query), $polar->summary

What was stored, what was asked, and the sums.

=cut

sub events
{
	my ($self, %query) = @_;
	return @{ scalar $self->_control('GET', _query('events', %query)) };
}

sub requests
{
	my ($self, %query) = @_;
	return @{ scalar $self->_control('GET', _query('requests', %query)) };
}

sub summary
{
	my ($self) = @_;
	return scalar $self->_control('GET', 'summary');
}

=pod

=item $polar->fault(kind => $kind, ...), $polar->clear_faults, $polar->release

Queue a fault; forget all; let go of the requests that hang.

=cut

sub fault
{
	my ($self, %fault) = @_;
	$self->_control('POST', 'fault', \%fault);
	return;
}

sub clear_faults
{
	my ($self) = @_;
	$self->_control('DELETE', 'fault');
	return;
}

sub release
{
	my ($self) = @_;
	$self->_control('POST', 'release', {});
	return;
}

=pod

=item $polar->reset(%options)

As just started; keep => ['events'] spares the events.

=item $polar->tokens(%token), $polar->customers(%customers),
$polar->rate_limit($limit, $window), $polar->prices(\@rows),
$polar->file($path, $body, $content_type)

=cut

sub reset
{
	my ($self, %options) = @_;
	$self->_control('POST', 'reset', \%options);
	return;
}

sub tokens
{
	my ($self, %token) = @_;
	$self->_control('POST', 'tokens', \%token);
	return;
}

sub customers
{
	my ($self, %customers) = @_;
	$self->_control('POST', 'customers', \%customers);
	return;
}

sub rate_limit
{
	my ($self, $limit, $window) = @_;
	$self->_control('POST', 'rate_limit',
		{ limit => $limit, window => $window // 60 });
	return;
}

sub prices
{
	my ($self, $rows) = @_;
	$self->_control('POST', 'prices', $rows);
	return;
}

sub file
{
	my ($self, $path, $body, $content_type) = @_;
	$self->_control(
		'POST', 'files',
		{
			path => $path,
			body => $body,
			content_type => $content_type // 'application/json'
		});
	return;
}

=pod

=item $polar->change(\@external_ids, %what), $polar->meter($id, %meter)

Change or remove stored events, make a meter; see polar_server.py.

=cut

sub change
{
	my ($self, $external_ids, %what) = @_;

	return $self->_control(POST => 'change', { external_ids => $external_ids, %what });
}

sub meter
{
	my ($self, $id, %meter) = @_;

	return $self->_control(POST => 'meters', { property => 'cost_nanos', %meter, id => $id });
}

=pod

=item $polar->wait(%conditions)

Block until all conditions hold: events, requests, arrived, hung, duplicates
(at least so many), status and count. Returns the summary; dies at the timeout
of PostgreSQL's tests.

=cut

sub wait
{
	my ($self, %conditions) = @_;
	my ($summary, $status) = $self->_control('GET',
		_query('wait', timeout => _timeout(), %conditions));

	_give_up(
		join(', ', map { "$_ = $conditions{$_}" } sort keys %conditions)
		  . ', have '
		  . $json->encode($summary))
	  if $status == 408;
	return $summary;
}

=pod

=cut

# In a test, what has not come is a failed test of its own; then the end.  (Of the stand-in's own tests one is of
# this.)
our $is_test = 1;

sub _give_up
{
	my ($what) = @_;

	Test::More::fail("timed out waiting for $what") if $is_test && $INC{'Test/More.pm'};
	croak "timed out waiting for $what";
}

=pod

=item $polar->wait_for($condition, $what)

Block until the function returns true. It is called again whenever the
stand-in has been asked something, and at least every tenth of a second for
what happens elsewhere. Dies at the timeout.

=cut

sub wait_for
{
	my ($self, $condition, $what) = @_;
	my $deadline = Time::HiRes::time() + _timeout();
	my $version = -1;

	until ($condition->())
	{
		_give_up($what // 'a condition') if Time::HiRes::time() > $deadline;

		# The stand-in may be down just now, on purpose.
		my $answer = $self->request('GET',
			_query('/_test/wait', version => $version, timeout => 0.1));
		if ($answer->{json})
		{
			$version = $answer->{json}{version};
		}
		else
		{
			select(undef, undef, undef, 0.1);
		}
	}
	return 1;
}

=pod

=back

=cut

1;
